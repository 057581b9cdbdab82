"""One page of HTML, and plots, from the records of a checkpoint."""
