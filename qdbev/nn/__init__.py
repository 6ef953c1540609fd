"""Network parts that several detectors share."""
