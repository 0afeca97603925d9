"""Who is asked: an endpoint, a model here; what they are asked, and what they replied."""
