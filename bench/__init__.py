"""Everything that measures the pipeline or checks it as a whole. No other room imports this package."""
