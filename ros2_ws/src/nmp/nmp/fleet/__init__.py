"""Building a city from the recorded drives of many cars, on several processes or machines. docs/prior.md tells more."""
