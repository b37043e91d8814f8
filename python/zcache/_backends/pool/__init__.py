"""A pool: values of many sources under one bound, in a few files or in memory."""
