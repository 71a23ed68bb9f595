//! A container's figures as containerd's cgroups library carries them, for cgroups of version 1 and 2.

/// `io.containerd.cgroups.v1`: the figures that are filled in.
pub mod v1 {
    /// All figures.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metrics {
        /// By page size.
        #[prost(message, repeated, tag = "1")]
        pub hugetlb: Vec<Hugetlb>,
        /// Processes.
        #[prost(message, optional, tag = "2")]
        pub pids: Option<Pids>,
        /// Processor.
        #[prost(message, optional, tag = "3")]
        pub cpu: Option<Cpu>,
        /// Memory.
        #[prost(message, optional, tag = "4")]
        pub memory: Option<Memory>,
        /// Kills.
        #[prost(message, optional, tag = "9")]
        pub memory_oom_control: Option<OomControl>,
    }

    /// Huge pages of one size.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Hugetlb {
        /// Bytes.
        #[prost(uint64, tag = "1")]
        pub usage: u64,
        /// The size.
        #[prost(string, tag = "4")]
        pub pagesize: String,
    }

    /// Processes and threads.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Pids {
        /// How many.
        #[prost(uint64, tag = "1")]
        pub current: u64,
        /// The limit; 0 for none.
        #[prost(uint64, tag = "2")]
        pub limit: u64,
    }

    /// Processor.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Cpu {
        /// Time.
        #[prost(message, optional, tag = "1")]
        pub usage: Option<CpuUsage>,
        /// The quota.
        #[prost(message, optional, tag = "2")]
        pub throttling: Option<Throttle>,
    }

    /// Processor time in nanoseconds.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct CpuUsage {
        /// All.
        #[prost(uint64, tag = "1")]
        pub total: u64,
        /// In the kernel.
        #[prost(uint64, tag = "2")]
        pub kernel: u64,
        /// In programs.
        #[prost(uint64, tag = "3")]
        pub user: u64,
    }

    /// What the quota did.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Throttle {
        /// Periods.
        #[prost(uint64, tag = "1")]
        pub periods: u64,
        /// Those held back.
        #[prost(uint64, tag = "2")]
        pub throttled_periods: u64,
        /// Nanoseconds held back.
        #[prost(uint64, tag = "3")]
        pub throttled_time: u64,
    }

    /// Memory in bytes.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Memory {
        /// Page cache.
        #[prost(uint64, tag = "1")]
        pub cache: u64,
        /// Anonymous.
        #[prost(uint64, tag = "2")]
        pub rss: u64,
        /// Mapped files.
        #[prost(uint64, tag = "4")]
        pub mapped_file: u64,
        /// Faults.
        #[prost(uint64, tag = "9")]
        pub pg_fault: u64,
        /// Faults that read.
        #[prost(uint64, tag = "10")]
        pub pg_maj_fault: u64,
        /// Idle anonymous.
        #[prost(uint64, tag = "11")]
        pub inactive_anon: u64,
        /// Busy anonymous.
        #[prost(uint64, tag = "12")]
        pub active_anon: u64,
        /// Idle files.
        #[prost(uint64, tag = "13")]
        pub inactive_file: u64,
        /// Busy files.
        #[prost(uint64, tag = "14")]
        pub active_file: u64,
        /// Locked.
        #[prost(uint64, tag = "15")]
        pub unevictable: u64,
        /// The limit.
        #[prost(uint64, tag = "16")]
        pub hierarchical_memory_limit: u64,
        /// The limit with swap.
        #[prost(uint64, tag = "17")]
        pub hierarchical_swap_limit: u64,
        /// With those below.
        #[prost(uint64, tag = "18")]
        pub total_cache: u64,
        /// With those below.
        #[prost(uint64, tag = "19")]
        pub total_rss: u64,
        /// With those below.
        #[prost(uint64, tag = "21")]
        pub total_mapped_file: u64,
        /// With those below.
        #[prost(uint64, tag = "26")]
        pub total_pg_fault: u64,
        /// With those below.
        #[prost(uint64, tag = "27")]
        pub total_pg_maj_fault: u64,
        /// With those below.
        #[prost(uint64, tag = "28")]
        pub total_inactive_anon: u64,
        /// With those below.
        #[prost(uint64, tag = "29")]
        pub total_active_anon: u64,
        /// With those below.
        #[prost(uint64, tag = "30")]
        pub total_inactive_file: u64,
        /// With those below.
        #[prost(uint64, tag = "31")]
        pub total_active_file: u64,
        /// With those below.
        #[prost(uint64, tag = "32")]
        pub total_unevictable: u64,
        /// In use.
        #[prost(message, optional, tag = "33")]
        pub usage: Option<MemoryEntry>,
        /// In use with swap.
        #[prost(message, optional, tag = "34")]
        pub swap: Option<MemoryEntry>,
    }

    /// One counter.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct MemoryEntry {
        /// Its limit.
        #[prost(uint64, tag = "1")]
        pub limit: u64,
        /// In use.
        #[prost(uint64, tag = "2")]
        pub usage: u64,
        /// The most ever.
        #[prost(uint64, tag = "3")]
        pub max: u64,
    }

    /// Kills by the limit.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct OomControl {
        /// How many.
        #[prost(uint64, tag = "3")]
        pub oom_kill: u64,
    }
}

/// `io.containerd.cgroups.v2`: the figures that are filled in.
pub mod v2 {
    /// All figures.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metrics {
        /// Processes.
        #[prost(message, optional, tag = "1")]
        pub pids: Option<Pids>,
        /// Processor.
        #[prost(message, optional, tag = "2")]
        pub cpu: Option<Cpu>,
        /// Memory.
        #[prost(message, optional, tag = "4")]
        pub memory: Option<Memory>,
        /// Devices.
        #[prost(message, optional, tag = "6")]
        pub io: Option<Io>,
        /// By page size.
        #[prost(message, repeated, tag = "7")]
        pub hugetlb: Vec<Hugetlb>,
        /// Kills.
        #[prost(message, optional, tag = "8")]
        pub memory_events: Option<MemoryEvents>,
    }

    /// Processes and threads.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Pids {
        /// How many.
        #[prost(uint64, tag = "1")]
        pub current: u64,
        /// The limit; 0 for none.
        #[prost(uint64, tag = "2")]
        pub limit: u64,
    }

    /// Processor time in microseconds.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Cpu {
        /// All.
        #[prost(uint64, tag = "1")]
        pub usage_usec: u64,
        /// In programs.
        #[prost(uint64, tag = "2")]
        pub user_usec: u64,
        /// In the kernel.
        #[prost(uint64, tag = "3")]
        pub system_usec: u64,
        /// Periods of the quota.
        #[prost(uint64, tag = "4")]
        pub nr_periods: u64,
        /// Those held back.
        #[prost(uint64, tag = "5")]
        pub nr_throttled: u64,
        /// How long.
        #[prost(uint64, tag = "6")]
        pub throttled_usec: u64,
    }

    /// Memory in bytes.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Memory {
        /// Anonymous.
        #[prost(uint64, tag = "1")]
        pub anon: u64,
        /// Page cache.
        #[prost(uint64, tag = "2")]
        pub file: u64,
        /// Kernel stacks.
        #[prost(uint64, tag = "3")]
        pub kernel_stack: u64,
        /// Kernel objects.
        #[prost(uint64, tag = "4")]
        pub slab: u64,
        /// Sockets.
        #[prost(uint64, tag = "5")]
        pub sock: u64,
        /// Shared.
        #[prost(uint64, tag = "6")]
        pub shmem: u64,
        /// Mapped files.
        #[prost(uint64, tag = "7")]
        pub file_mapped: u64,
        /// Not written yet.
        #[prost(uint64, tag = "8")]
        pub file_dirty: u64,
        /// Being written.
        #[prost(uint64, tag = "9")]
        pub file_writeback: u64,
        /// In huge pages.
        #[prost(uint64, tag = "10")]
        pub anon_thp: u64,
        /// Idle anonymous.
        #[prost(uint64, tag = "11")]
        pub inactive_anon: u64,
        /// Busy anonymous.
        #[prost(uint64, tag = "12")]
        pub active_anon: u64,
        /// Idle files.
        #[prost(uint64, tag = "13")]
        pub inactive_file: u64,
        /// Busy files.
        #[prost(uint64, tag = "14")]
        pub active_file: u64,
        /// Locked.
        #[prost(uint64, tag = "15")]
        pub unevictable: u64,
        /// Can be freed.
        #[prost(uint64, tag = "16")]
        pub slab_reclaimable: u64,
        /// Cannot.
        #[prost(uint64, tag = "17")]
        pub slab_unreclaimable: u64,
        /// Faults.
        #[prost(uint64, tag = "18")]
        pub pgfault: u64,
        /// Faults that read.
        #[prost(uint64, tag = "19")]
        pub pgmajfault: u64,
        /// In use.
        #[prost(uint64, tag = "32")]
        pub usage: u64,
        /// The limit.
        #[prost(uint64, tag = "33")]
        pub usage_limit: u64,
        /// Swap in use.
        #[prost(uint64, tag = "34")]
        pub swap_usage: u64,
        /// Its limit.
        #[prost(uint64, tag = "35")]
        pub swap_limit: u64,
        /// The most ever.
        #[prost(uint64, tag = "36")]
        pub max_usage: u64,
    }

    /// What the limit did.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct MemoryEvents {
        /// Kills.
        #[prost(uint64, tag = "5")]
        pub oom_kill: u64,
    }

    /// Devices.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Io {
        /// Each.
        #[prost(message, repeated, tag = "1")]
        pub usage: Vec<IoEntry>,
    }

    /// One device.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct IoEntry {
        /// Its major number.
        #[prost(uint64, tag = "1")]
        pub major: u64,
        /// Its minor number.
        #[prost(uint64, tag = "2")]
        pub minor: u64,
        /// Bytes read.
        #[prost(uint64, tag = "3")]
        pub rbytes: u64,
        /// Bytes written.
        #[prost(uint64, tag = "4")]
        pub wbytes: u64,
        /// Reads.
        #[prost(uint64, tag = "5")]
        pub rios: u64,
        /// Writes.
        #[prost(uint64, tag = "6")]
        pub wios: u64,
    }

    /// Huge pages of one size.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Hugetlb {
        /// Bytes.
        #[prost(uint64, tag = "1")]
        pub current: u64,
        /// The size.
        #[prost(string, tag = "3")]
        pub pagesize: String,
    }
}
