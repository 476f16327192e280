//! `ferry daemon`: run ferryd in the foreground, as a service manager wants it.

use super::migrate::ConfigArg;
use crate::config::Config;
use crate::daemon::Daemon;
use crate::toolstack::ServiceDomain;
use anyhow::Result;
use hypervisor::Hypervisor;
use std::sync::Arc;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArg,
}

pub fn run(args: Args) -> Result<()> {
    let config = Config::read(&args.config.config)?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(xen_host::XenHost::open()?);
    let toolstack = Arc::new(ServiceDomain::new(hypervisor.clone(), &config.state_dir)?);
    Daemon::new(config, hypervisor, toolstack, Box::new(ServiceDomain::find))?.serve()
}
