"""What a request can cost at most, and what it did cost. Pure: no clock, no database, no HTTP."""
