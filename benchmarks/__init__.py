"""What the ops and the adapter take, measured beside what else computes the same, and how it is reported."""
