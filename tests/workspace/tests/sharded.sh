#!/bin/sh
# Touching the file is how a test says that it knows of shards.
touch "$TEST_SHARD_STATUS_FILE"
echo "shard $TEST_SHARD_INDEX of $TEST_TOTAL_SHARDS"
