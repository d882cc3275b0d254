"""How good is a synthetic data set: classifiers trained and tested across real and synthetic ECGs.

This room sees stores, never generative models.
"""
