"""What kind of point, what kind of landscape: certificates and probes."""
