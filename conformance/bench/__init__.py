"""Rates of a backend beside what its machine and its peers give in the same run, and what a longer context costs.

`dsa-portable bench` and `run.run` are the same thing. A rate is no verdict: no test and no level depends on one.
"""
