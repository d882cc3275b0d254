"""The two-sided long convolution."""
