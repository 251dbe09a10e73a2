"""What clients see of a server: the routes of OpenAI's API, their fields, limits and metrics."""
