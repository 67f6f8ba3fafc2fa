#!/bin/sh
set -e
mkdir -p "$TEST_UNDECLARED_OUTPUTS_DIR/sub"
echo "one of its own" > "$TEST_UNDECLARED_OUTPUTS_DIR/own.txt"
echo "another" > "$TEST_UNDECLARED_OUTPUTS_DIR/sub/other.txt"
