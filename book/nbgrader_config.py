"""Settings of a course with nbgrader; `make course` copies them into it."""

c = get_config()  # noqa: F821

# The hole that a solution leaves is that of the student edition, notebooks/student/.
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("Replace this line by your answer.")'}
# Seconds a cell: a lab takes a minute, but an answer may be slower than ours.
c.Execute.timeout = 600
