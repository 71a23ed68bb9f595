//! The executable under its own name: makes the links, lists what is held, takes everything away.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs, io,
    io::{Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::ExitCode,
};

use cni_plugins_host::{file, netns, overlay};
use cni_plugins_types::{Version, config::is_name, ipam::leases::Leases};
use serde_json::{Value, json};

use crate::{
    call::keys,
    failure::chain,
    log,
    plugins::{self, Plugin, ipam},
    state,
};

/// The name by which containerd calls the plugin that brings `lo` up.
const LOOPBACK: &str = "loopback";
/// Largest configuration that is read.
const MAX_CONFIGURATION: u64 = 16 << 20;
const USAGE: &str = "usage:
  keelson-cni install DIR        make the plugins' links in DIR, and loopback where there is none
  keelson-cni leases [OPTIONS]   print the addresses in use, one JSON object a line
  keelson-cni cleanup [OPTIONS]  remove interfaces, bridges, addresses, state and logs of the plugins, and the network
                                 between nodes (stop the agent first: it makes that again)
  keelson-cni uninstall [OPTIONS]  the same, and the links and the configurations that begin with one of the plugins; others
                                 that name one are told
options:
  --conf-dir DIR   network configurations (/etc/cni/net.d); their dataDir, stateDir and logFile count
  --bin-dir DIR    where the links are (/opt/cni/bin)
  --data-dir DIR, --state-dir DIR, --log-file FILE   instead of the places used by default
Called by a CNI runtime through a link such as keelson-bridge it is that plugin.";

/// The command line of the executable under its own name.
pub(crate) fn main(args: &[OsString]) -> ExitCode {
    let outcome = match args {
        // Wherever it is: whoever asks for help wants nothing to be done.
        _ if args.iter().any(|one| one == "--help" || one == "-h") => say(&USAGE),
        [command, dir] if command == "install" => install(Path::new(dir)),
        [command, options @ ..] if command == "leases" => Places::of(options).and_then(|at| leases(&at)),
        [command, options @ ..] if command == "cleanup" => Places::of(options).and_then(|at| cleanup(&at)),
        [command, options @ ..] if command == "uninstall" => {
            Places::of(options).and_then(|at| cleanup(&at).and_then(|()| uninstall(&at)))
        }
        [command] if command == "help" => say(&USAGE),
        [command] if command == "--version" => {
            let versions = Version::ALL.map(Version::as_str).join(", ");
            say(&format!("keelson-cni {} for CNI {versions}", env!("CARGO_PKG_VERSION")))
        }
        [] => Err(io::Error::other(USAGE)),
        [command] if command == "install" => {
            Err(io::Error::other(format!("install: DIR is missing\n{USAGE}")))
        }
        [command, ..] => {
            let command = command.to_string_lossy();
            Err(io::Error::other(format!("{command} is not a command, or has too many arguments\n{USAGE}")))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match writeln!(io::stderr(), "keelson-cni: {error}") {
            Ok(()) | Err(_) => ExitCode::FAILURE,
        },
    }
}

/// Everything that the plugins write to, by the options and by the configurations found.
struct Places {
    conf_dir: PathBuf,
    bin_dir: PathBuf,
    data_dirs: BTreeSet<PathBuf>,
    /// Those of them that are nobody else's; a configuration's may be shared, as /var/lib/cni is.
    own_data_dirs: BTreeSet<PathBuf>,
    /// Directories of the networks that a configuration names.
    networks_named: BTreeSet<PathBuf>,
    state_dirs: BTreeSet<PathBuf>,
    logs: BTreeSet<PathBuf>,
    /// Configurations that begin with one of ours.
    configurations: Vec<PathBuf>,
    /// Others that name one of ours: what of theirs is ours goes, they themselves stay.
    foreign: Vec<PathBuf>,
}

impl Places {
    fn of(options: &[OsString]) -> io::Result<Self> {
        let mut places = Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dir: "/opt/cni/bin".into(),
            data_dirs: BTreeSet::new(),
            own_data_dirs: BTreeSet::new(),
            networks_named: BTreeSet::new(),
            state_dirs: BTreeSet::new(),
            logs: BTreeSet::new(),
            configurations: Vec::new(),
            foreign: Vec::new(),
        };
        let mut options = options.iter();
        while let Some(option) = options.next() {
            let text = option.to_string_lossy().into_owned();
            let (name, joined) = match text.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value)),
                None => (text.clone(), None),
            };
            let mut value = || {
                let value = joined.map(PathBuf::from).or_else(|| options.next().map(PathBuf::from));
                let value = value.filter(|path| !path.as_os_str().is_empty());
                value.ok_or_else(|| io::Error::other(format!("{name}: a directory is missing\n{USAGE}")))
            };
            match name.as_str() {
                "--conf-dir" => places.conf_dir = value()?,
                "--bin-dir" => places.bin_dir = value()?,
                "--data-dir" => drop(places.data_dirs.insert(value()?)),
                "--state-dir" => drop(places.state_dirs.insert(value()?)),
                "--log-file" => drop(places.logs.insert(value()?)),
                _ => return Err(io::Error::other(format!("{name} is not an option\n{USAGE}"))),
            }
        }
        for (set, default) in [
            (&mut places.data_dirs, ipam::DEFAULT_DATA_DIR),
            (&mut places.state_dirs, state::DEFAULT_DIR),
            (&mut places.logs, log::DEFAULT_FILE),
        ] {
            if set.is_empty() {
                set.insert(default.into());
            }
        }
        places.own_data_dirs = places.data_dirs.clone();
        places.read_configurations()?;
        Ok(places)
    }

    fn read_configurations(&mut self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.conf_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(|error| about(&self.conf_dir, &error))?,
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_configuration =
                path.extension().is_some_and(|end| end == "conflist" || end == "conf" || end == "json");
            if !is_configuration {
                continue;
            }
            let read = file::read_regular(&path, MAX_CONFIGURATION);
            match read.and_then(|text| Ok(serde_json::from_slice(&text)?)) {
                Ok(value) => self.note(path, value),
                // Not ours to judge; but what it says is not counted.
                Err(error) => warn(&format!("{} is left out: {error}", path.display()))?,
            }
        }
        Ok(())
    }

    /// Takes in what a configuration says of places.
    fn note(&mut self, path: PathBuf, mut configuration: Value) {
        keys::fold(&mut configuration);
        let plugins = match configuration.get("plugins").and_then(Value::as_array) {
            Some(plugins) => plugins.iter().collect(),
            None => vec![&configuration],
        };
        let is_ours = |plugin: &&Value| plugin["type"].as_str().and_then(Plugin::named).is_some();
        let mut sections = Vec::new();
        for plugin in &plugins {
            ipam_sections(plugin, &mut sections);
        }
        let begins_with_ours = plugins.first().is_some_and(is_ours);
        if begins_with_ours {
            self.configurations.push(path);
        } else if !sections.is_empty() || plugins.iter().any(is_ours) {
            self.foreign.push(path);
        }
        let named = |value: &Value| value.as_str().filter(|text| text.starts_with('/')).map(PathBuf::from);
        for plugin in plugins.into_iter().filter(is_ours) {
            self.state_dirs.extend(named(&plugin["stateDir"]));
            self.logs.extend(named(&plugin["logFile"]));
            // Its addresses are ours where it does not say whose.
            if plugin["type"] == Plugin::Vxlan.name() && plugin["ipam"]["type"].is_null() {
                sections.push(&plugin["ipam"]);
            }
        }
        let network = configuration["name"].as_str().filter(|name| is_name(name));
        for section in sections {
            // Below another's plugin keys stay as they are written until ours is called.
            let mut section = section.clone();
            keys::fold(&mut section);
            let Some(dir) = named(&section["dataDir"]) else { continue };
            self.networks_named.extend(network.map(|network| dir.join(network)));
            self.data_dirs.insert(dir);
        }
    }

    /// Directories of networks below the data directories.
    fn networks(&self) -> Vec<PathBuf> {
        self.below_data_dirs().filter(|path| path.join("leases").is_file() && self.is_ours(path)).collect()
    }

    /// Directories below them that have a lock and nothing else: no address was ever given.
    fn untouched_networks(&self) -> Vec<PathBuf> {
        let is_untouched = |path: &PathBuf| {
            let names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.collect::<Vec<_>>() == ["lock"]
        };
        self.below_data_dirs().filter(|path| is_untouched(path) && self.is_ours(path)).collect()
    }

    fn below_data_dirs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let entries = self.data_dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
        entries.map(|entry| entry.path())
    }

    /// Whether a network's directory is ours: by its place, by a configuration, or by how its log begins.
    fn is_ours(&self, network: &Path) -> bool {
        let is_log = || {
            file::open_regular(&network.join("leases")).is_ok_and(|file| {
                let mut beginning = Vec::new();
                file.take(64).read_to_end(&mut beginning).is_ok() && Leases::is_log(&beginning)
            })
        };
        network.parent().is_some_and(|dir| self.own_data_dirs.contains(dir))
            || self.networks_named.contains(network)
            || is_log()
    }
}

/// Every section of ours that gives addresses, wherever it is: a foreign plugin may have it, or one that it delegates to.
fn ipam_sections<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(object) => {
            if object.get("type").is_some_and(|kind| kind == Plugin::Ipam.name()) {
                found.push(value);
            }
            object.values().for_each(|value| ipam_sections(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| ipam_sections(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn install(dir: &Path) -> io::Result<()> {
    let executable = std::env::current_exe()?;
    fs::create_dir_all(dir).map_err(|error| about(dir, &error))?;
    // Where another plugin of that name is, containerd has what it needs; a link that leads nowhere is none.
    let others = dir.join(LOOPBACK).exists() && !is_own_loopback(dir);
    let names = Plugin::ALL.map(Plugin::name).into_iter();
    for name in names.chain((!others).then_some(LOOPBACK)) {
        let temporary = dir.join(format!(".{name}.{}", std::process::id()));
        symlink(&executable, &temporary).map_err(|error| about(&temporary, &error))?;
        let link = dir.join(name);
        fs::rename(&temporary, &link).map_err(|error| about(&link, &error))?;
    }
    Ok(())
}

/// Whether `loopback` is a link to where our own plugins' links lead.
fn is_own_loopback(dir: &Path) -> bool {
    let own = Plugin::Loopback.name();
    fs::read_link(dir.join(LOOPBACK))
        .is_ok_and(|target| fs::read_link(dir.join(own)).is_ok_and(|ours| ours == target))
}

fn leases(places: &Places) -> io::Result<()> {
    let mut failures = Vec::new();
    for dir in places.networks() {
        let network = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let store = match ipam::store::Store::open(&dir) {
            Ok(store) => store,
            Err(failure) => {
                failures.push(failure.to_string());
                continue;
            }
        };
        for lease in store.leases().iter() {
            let addresses: Vec<String> = lease.addrs.iter().map(ToString::to_string).collect();
            let mut line = json!({
                "network": network,
                "container": lease.owner.container_id,
                "interface": lease.owner.ifname,
                "addresses": addresses,
                "netns": lease.netns,
            });
            // Only sticky leases know it.
            if !lease.pod.is_empty() {
                line["pod"] = json!(lease.pod);
            }
            say(&line)?;
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(io::Error::other(failures.join("\n"))) }
}

/// Removes what the plugins made, in this network namespace, and what they know; goes on past failures.
fn cleanup(places: &Places) -> io::Result<()> {
    let mut failures = Vec::new();
    for outcome in plugins::cleanup() {
        match outcome {
            Ok(removed) => removed.iter().try_for_each(say)?,
            Err(failure) => failures.push(failure.to_string()),
        }
    }
    for network in places.networks().into_iter().chain(places.untouched_networks()) {
        remove_path(&network, &mut failures)?;
    }
    // The state goes last, as it tells what is to go; an agent that runs on makes all of it again.
    for state in places.state_dirs.iter().map(|dir| dir.join(overlay::FILE_NAME)) {
        if state.exists() {
            match overlay::take_down(overlay::device(&state).as_deref()) {
                Ok(gone) => gone.iter().try_for_each(say)?,
                Err(error) => failures.push(format!("the network between nodes: {}", chain(&error))),
            }
            remove_path(&state, &mut failures)?;
        }
    }
    // Records of other network namespaces belong to other nodes.
    let own = netns::own_identity().map_err(io::Error::other)?.to_string();
    let below = |dir: &PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    for plugin in places.state_dirs.iter().flat_map(below).filter(|path| path.is_dir()) {
        remove_path(&plugin.join(&own), &mut failures)?;
        drop(fs::remove_dir(plugin));
    }
    for log in &places.logs {
        remove_path(log, &mut failures)?;
        remove_path(&log.with_extension("log.1"), &mut failures)?;
    }
    // Shared with others, perhaps: only when nothing is left in them.
    for dir in places.data_dirs.iter().chain(&places.state_dirs) {
        drop(fs::remove_dir(dir));
    }
    if failures.is_empty() { Ok(()) } else { Err(io::Error::other(failures.join("\n"))) }
}

/// Removes a path and says so; what cannot be removed is a failure among others.
fn remove_path(path: &Path, failures: &mut Vec<String>) -> io::Result<()> {
    match remove_all(path) {
        Ok(true) => say(&path.display()),
        Ok(false) => Ok(()),
        Err(error) => {
            failures.push(about(path, &error).to_string());
            Ok(())
        }
    }
}

fn uninstall(places: &Places) -> io::Result<()> {
    for path in &places.foreign {
        warn(&format!("{} stays and names plugins that are removed", path.display()))?;
    }
    for path in &places.configurations {
        fs::remove_file(path).map_err(|error| about(path, &error))?;
        say(&path.display())?;
    }
    // Told by the others' target, so before they go.
    let loopback = is_own_loopback(&places.bin_dir).then_some(LOOPBACK);
    for name in loopback.into_iter().chain(Plugin::ALL.map(Plugin::name)) {
        let link = places.bin_dir.join(name);
        if fs::read_link(&link).is_ok() {
            fs::remove_file(&link).map_err(|error| about(&link, &error))?;
            say(&link.display())?;
        }
    }
    Ok(())
}

/// Removes a file or a directory with all it holds; tells whether there was one.
fn remove_all(path: &Path) -> io::Result<bool> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn say(what: &impl std::fmt::Display) -> io::Result<()> {
    writeln!(io::stdout(), "{what}")
}

fn warn(what: &str) -> io::Result<()> {
    writeln!(io::stderr(), "keelson-cni: {what}")
}

fn about(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
