"""The GPTQ column loop and the scale search: a fast kernel each, and a slow twin that it is tested against."""
