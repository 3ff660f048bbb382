"""What is read: the order of samples, their view parameters, the sources, and the pipeline from bytes to views."""
