//! `cargo xtask`: every task of the project that is not a plain cargo command.

fn main() {}
