"""dray measured: ``python -m benchmarks``. Not part of the wheel."""
