//! Operation numbers (`enum xsd_sockmsg_type` in `io/xs_wire.h`, newer ones from `docs/misc/xenstore.txt`), and ours.

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $num:literal, $text:literal;)*) => {
        /// A message's type.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Op { $($(#[$doc])* $name),* }

        impl Op {
            /// Every operation.
            pub const ALL: &'static [Op] = &[$(Op::$name),*];

            /// From the header's `type` field.
            pub fn from_wire(n: u32) -> Option<Op> {
                match n { $($num => Some(Op::$name),)* _ => None }
            }

            /// The header's `type` field.
            pub fn to_wire(self) -> u32 {
                match self { $(Op::$name => $num),* }
            }

            /// The name used in Xen's documentation, or in ours for our own.
            pub fn name(self) -> &'static str {
                match self { $(Op::$name => $text),* }
            }
        }
    };
}

ops! {
    /// Commands to the daemon itself, privileged.
    Control = 0, "CONTROL";
    /// Names of a node's children.
    Directory = 1, "DIRECTORY";
    /// Value of a node.
    Read = 2, "READ";
    /// Permissions of a node.
    GetPerms = 3, "GET_PERMS";
    /// Register a watch.
    Watch = 4, "WATCH";
    /// Remove a watch.
    Unwatch = 5, "UNWATCH";
    /// Open a transaction.
    TransactionStart = 6, "TRANSACTION_START";
    /// Commit or discard a transaction.
    TransactionEnd = 7, "TRANSACTION_END";
    /// Connect to a domain, privileged.
    Introduce = 8, "INTRODUCE";
    /// Disconnect from a domain, privileged.
    Release = 9, "RELEASE";
    /// `/local/domain/<domid>`.
    GetDomainPath = 10, "GET_DOMAIN_PATH";
    /// Set a node's value.
    Write = 11, "WRITE";
    /// Make sure that a node exists.
    Mkdir = 12, "MKDIR";
    /// Remove a node and all below.
    Rm = 13, "RM";
    /// Set permissions of a node.
    SetPerms = 14, "SET_PERMS";
    /// Unsolicited message for a watch that fired.
    WatchEvent = 15, "WATCH_EVENT";
    /// Reply that carries an error's name.
    Error = 16, "ERROR";
    /// Whether there is a connection to a domain, privileged.
    IsDomainIntroduced = 17, "IS_DOMAIN_INTRODUCED";
    /// Look out again for a shutdown of a domain, privileged.
    Resume = 18, "RESUME";
    /// Give a domain the rights of another, privileged.
    SetTarget = 19, "SET_TARGET";
    /// Drop all watches and transactions of the caller.
    ResetWatches = 21, "RESET_WATCHES";
    /// A part of a long list of children.
    DirectoryPart = 22, "DIRECTORY_PART";
    /// Feature bits of a domain's ring page, privileged.
    GetFeature = 23, "GET_FEATURE";
    /// Set the feature bits of a domain not yet introduced, privileged.
    SetFeature = 24, "SET_FEATURE";
    /// A quota, privileged.
    GetQuota = 25, "GET_QUOTA";
    /// Set a quota, privileged.
    SetQuota = 26, "SET_QUOTA";
    /// Which of the operations below there are. See docs/xenstore-migration-ops.md for all of them.
    FerryFeatures = 0x4645_0000, "FERRY_FEATURES";
    /// Stop serving a domain's connection and snapshot the store.
    DomainFreeze = 0x4645_0001, "DOMAIN_FREEZE";
    /// Serve it again.
    DomainThaw = 0x4645_0002, "DOMAIN_THAW";
    /// Read the stream of a frozen domain.
    DomainExport = 0x4645_0003, "DOMAIN_EXPORT";
    /// Bring a part of a stream for a domain that is not introduced.
    DomainImportData = 0x4645_0004, "DOMAIN_IMPORT_DATA";
    /// Apply the stream that was brought.
    DomainImport = 0x4645_0005, "DOMAIN_IMPORT";
    /// Connect to an imported domain without a reset of its ring.
    DomainAttach = 0x4645_0006, "DOMAIN_ATTACH";
    /// Undo an import.
    DomainImportAbort = 0x4645_0007, "DOMAIN_IMPORT_ABORT";
    /// List another domain's watches.
    DomainListWatches = 0x4645_0008, "DOMAIN_LIST_WATCHES";
    /// Register a watch for another domain, without the initial event.
    DomainSetWatch = 0x4645_0009, "DOMAIN_SET_WATCH";
}
