# List the recipes.
default:
    @just --list

# What CI does.
check:
    .ci/run

# Format the code.
fmt:
    cargo fmt

# Run the tests.
test *arguments:
    cargo test {{arguments}}

# Reinforcement pre-training from random weights; the report is runs/quickstart/report.html.
quickstart:
    cargo run --release -- run pipelines/quickstart.toml

# Run the benchmarks; benches/RESULTS.md says how to report them.
bench *arguments:
    cargo bench {{arguments}}
