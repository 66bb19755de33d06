"""`omni bench`: the speed of this library, measured beside transformers on the same machine, in the same run."""
