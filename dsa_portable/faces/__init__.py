"""Other people's ways to call the operators: a face translates its caller's conventions into the core's, no more."""
