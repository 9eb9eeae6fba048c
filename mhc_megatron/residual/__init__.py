"""The modules that an mHC spec names: what Megatron calls the residual, replaced."""
