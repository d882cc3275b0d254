"""The pointwise parts of a residual block, in (batch, H, L) layout throughout."""
