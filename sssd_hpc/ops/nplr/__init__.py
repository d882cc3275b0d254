"""The S4 convolution kernel from its DPLR parameters."""
