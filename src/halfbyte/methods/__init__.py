"""Methods: pure functions from a weight, a statistic and a format to codes and scales. One paper a file."""
