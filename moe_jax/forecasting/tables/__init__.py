"""Series in tables: CSV and parquet files and frames of pandas, in and out."""
