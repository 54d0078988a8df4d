"""What runs inside the sandbox: standard library only, imported there under the name `vigor_sandbox`.

`zygote` is process 1 of a sandbox and forks one child a program; `program` is such a child that runs a candidate;
`judge` is such a child, in another sandbox, that runs the tests; `wire` is how the two talk.
"""
