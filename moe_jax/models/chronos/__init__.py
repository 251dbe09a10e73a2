"""The Chronos forecasters (Ansari et al., 2024 and 2025): encoders and decoders of time series."""
