//! The counters behind the beat, shared by all threads.

use std::sync::atomic::{AtomicU64, Ordering};
use witness::report::Beat;

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn max(&self, n: u64) -> bool {
        self.0.fetch_max(n, Ordering::Relaxed) < n
    }

    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares a [`Counter`] for each field of [`Beat`] that is a number.
macro_rules! counters {
    ($($name:ident)*) => {
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub $name: Counter,)*
        }

        impl Counters {
            /// All of them now.
            pub fn beat(&self, loads: bool) -> Beat {
                Beat { loads, $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    up_ms anomalies anomalies_unsent reports_lost
    store_ops store_errors store_max_ms watch_writes watch_events watch_strays tx_committed tx_again tx_failed
    xen_reads grant_copies grant_bad events_sent events_back events_lost
    clock_reads clock_backwards gap_us gap_at_ms ticks tick_late_us steal_ms
    pages pages_bad regs regs_bad
    journal rewrites rereads disk_bad disk_max_ms
    tcp_sent tcp_back tcp_breaks tcp_max_ms udp_sent udp_back udp_max_ms rx rx_seq rx_max_ms link_changes klog
}
