//! The `ferry` command and its daemon.
//!
//! [`cli`] is the grammar, one module in [`commands`] per subcommand. A command returns `anyhow::Result`; what the shell
//! sees of a failure is decided in [`exit`] alone.

mod autostart;
mod busy;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod daemon;
pub mod domain;
pub mod exit;
pub mod host_check;
pub mod keeper;
pub mod learned;
mod stock_save;
pub mod toolstack;
mod undo;
pub mod xl_config;
