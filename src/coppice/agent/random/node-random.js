'use strict';
// Coppice: crypto.randomUUID and crypto.randomInt draw numbers ahead and keep them in the process, so
// forks of a warm process would return the same ones. Here they draw each number when it is wanted.
const crypto = require('crypto');

const fresh = (options) =>
  options === undefined ? { disableEntropyCache: true }
    : options !== null && typeof options === 'object' ? { ...options, disableEntropyCache: true }
      : options; // which the original refuses

const { randomUUID, randomInt } = crypto;
if (randomUUID) {
  const own = (options) => randomUUID(fresh(options));
  Object.defineProperty(own, 'name', { value: 'randomUUID' });
  crypto.randomUUID = own;
  const web = crypto.webcrypto && Object.getPrototypeOf(crypto.webcrypto);
  if (web && web.randomUUID) {
    const original = web.randomUUID;
    web.randomUUID = function randomUUID() {
      return this === crypto.webcrypto ? own() : original.call(this);
    };
  }
}

if (randomInt) {
  const values = 2 ** 48;
  crypto.randomInt = function (min, max, callback) {
    if (max === undefined || typeof max === 'function') [min, max, callback] = [0, min, max];
    randomInt(min, max); // checks the arguments
    if (callback !== undefined && typeof callback !== 'function') randomInt(min, max, callback);
    const range = max - min;
    let value;
    do value = crypto.randomBytes(6).readUIntBE(0, 6); while (value >= values - (values % range));
    value = (value % range) + min;
    if (callback === undefined) return value;
    process.nextTick(callback, undefined, value);
  };
  Object.defineProperty(crypto.randomInt, 'name', { value: 'randomInt' });
}

const { syncBuiltinESMExports } = require('module');
if (syncBuiltinESMExports) syncBuiltinESMExports();
