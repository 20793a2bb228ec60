"""The bitsandbytes engine: the torch engine, with bitsandbytes' NF4 products for the denoiser's linears."""
