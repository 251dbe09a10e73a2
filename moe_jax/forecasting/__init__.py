"""Forecasts of time series: models, jobs and metrics."""
