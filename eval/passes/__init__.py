"""What evaluation goes over rows and contexts with, once for all coders, and the sums it leaves."""
