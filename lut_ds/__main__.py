"""`python -m lut_ds`, for launchers that start a module."""

from lut_ds.cli import main

raise SystemExit(main())
