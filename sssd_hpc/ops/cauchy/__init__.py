"""The Cauchy sum over poles in conjugate pairs."""
