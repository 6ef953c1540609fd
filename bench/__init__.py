"""Everything that measures or checks the pipeline from outside; nothing imports this package."""
