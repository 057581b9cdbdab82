"""Model cards for the Hugging Face hub, written from records."""
