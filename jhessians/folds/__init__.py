"""What can be summed over documents at every linear. One statistic, one file."""
