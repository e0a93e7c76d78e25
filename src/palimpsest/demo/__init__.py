"""A tiny pair with a planted, undeclared change, made from nothing: a truth to hold an audit against."""
