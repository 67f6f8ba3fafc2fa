#!/bin/sh
echo "fails on purpose"
exit 1
