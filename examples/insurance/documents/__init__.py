"""The generated insurer: forms, policies, endorsements, letters, claims, and questions on them."""
