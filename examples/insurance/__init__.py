"""An insurance assistant on one machine: customers and operators ask what a policy covers."""
