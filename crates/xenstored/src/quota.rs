//! Limits on what one domain may use. Names and defaults are those of the stock daemon (Xen 4.17,
//! `tools/xenstore/xenstored_core.c`, and `docs/misc/xenstore.txt`).

use xenstore_wire::REL_PATH_MAX;

macro_rules! quotas {
    ($($field:ident, $name:literal, $default:expr, $text:literal;)*) => {
        /// Values of all quotas.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Quotas { $(#[doc = $text] pub $field: u32),* }

        impl Default for Quotas {
            fn default() -> Self {
                Quotas { $($field: $default),* }
            }
        }

        impl Quotas {
            /// Name and description of each.
            pub const NAMES: &'static [(&'static str, &'static str)] = &[$(($name, $text)),*];

            /// By name.
            pub fn get(&self, name: &[u8]) -> Option<u32> {
                $(if name == $name.as_bytes() { return Some(self.$field); })*
                None
            }

            /// By name; false if there is none of that name.
            pub fn set(&mut self, name: &[u8], value: u32) -> bool {
                $(if name == $name.as_bytes() { self.$field = value; return true; })*
                false
            }

            /// All values by name.
            pub fn named(&self) -> Vec<(Vec<u8>, u32)> {
                vec![$(($name.into(), self.$field)),*]
            }

            /// All values, in the order of the names.
            pub fn values(&self) -> Vec<u32> {
                vec![$(self.$field),*]
            }

            /// Of all values, in the order of the names.
            ///
            /// # Errors
            /// Their number is wrong.
            pub fn from_values(values: &[u32]) -> Result<Quotas, &'static str> {
                let [$($field),*] = *values else { return Err("the number of quotas is wrong") };
                Ok(Quotas { $($field),* })
            }
        }
    };
}

quotas! {
    nodes, "nodes", 1000, "Nodes per domain";
    watches, "watches", 128, "Watches per domain";
    transactions, "transactions", 10, "Transactions per domain";
    outstanding, "outstanding", 20, "Outstanding requests per domain";
    transaction_nodes, "transaction-nodes", 1024, "Max. number of accessed nodes per transaction";
    memory, "memory", 2 * 1024 * 1024 + 512 * 1024, "Total Xenstore memory per domain (error level)";
    node_size, "node-size", 2048, "Max. size of a node";
    path_max, "path-max", REL_PATH_MAX as u32, "Max. length of a node path";
    permissions, "permissions", 5, "Max. number of permissions per node";
}

/// The one soft quota: memory above which a warning is logged.
pub const SOFT_MEMORY: u32 = 2 * 1024 * 1024;

/// What the stock daemon's store holds for a node, which is what the quotas `node-size` and `memory` were made for:
/// a header of 24 bytes, 8 per permission, value, and the names of the children.
pub fn node_size(perms: usize, value: usize, children: usize) -> usize {
    24 + 8 * perms + value + children
}
