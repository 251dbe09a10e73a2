"""Which device holds which expert."""
