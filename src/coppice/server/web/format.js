// Numbers for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** @param {number} count @returns {string} */
export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) {
    count /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || count >= 100 || Number.isInteger(count) ? 0 : count >= 10 ? 1 : 2;
  return `${count.toFixed(digits)} ${UNITS[unit]}`;
}

/** @param {number} seconds @returns {string} */
export function age(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

/** @param {number} seconds since the epoch @returns {string} */
export function moment(seconds) {
  const when = new Date(seconds * 1000);
  return `${when.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" })}`;
}

/**
 * @typedef {{host_port: number, guest_port: number, protocol: string, host_address: string}} Publish
 * @param {Publish[]} publish
 * @returns {string}
 */
export function ports(publish) {
  return publish
    .map((each) => {
      const address = each.host_address === "127.0.0.1" ? "" : `${each.host_address}:`;
      const protocol = each.protocol === "tcp" ? "" : `/${each.protocol}`;
      return `${address}${each.host_port} → ${each.guest_port}${protocol}`;
    })
    .join(", ");
}

/** @param {number} count @param {string} noun @returns {string} */
export function counted(count, noun) {
  return `${count.toLocaleString()} ${noun}${count === 1 ? "" : "s"}`;
}
