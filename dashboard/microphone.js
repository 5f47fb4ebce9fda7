// Records the microphone as WAV: 16 kHz, mono, 16 bits, which is what the model hears.

const RATE = 16_000;
const HEADER_BYTES = 44;

// Returns {stop(), file: Promise<File>}; `tick(seconds)` tells how long it records.
export async function recordWav(tick) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  let seconds = 0;
  tick(seconds);
  const timer = setInterval(() => tick((seconds += 1)), 1000);
  const stopped = new Promise((resolve) => recorder.addEventListener("stop", resolve));
  recorder.start();
  const file = stopped.then(async () => {
    clearInterval(timer);
    for (const track of stream.getTracks()) track.stop();
    const recorded = await new Blob(pieces, { type: recorder.mimeType }).arrayBuffer();
    // Decoding resamples to the context's rate.
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(recorded);
    return new File([wav(mono(sound))], "recording.wav", { type: "audio/wav" });
  });
  return { stop: () => recorder.stop(), file };
}

function mono(sound) {
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  return channels[0].map((_, index) => channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length);
}

// Float samples, -1 to 1, as the bytes of a WAV file (RIFF, PCM).
function wav(samples) {
  const view = new DataView(new ArrayBuffer(HEADER_BYTES + 2 * samples.length));
  const write = (offset, letters) => {
    for (const [index, letter] of [...letters].entries()) view.setUint8(offset + index, letter.charCodeAt(0));
  };
  write(0, "RIFF");
  view.setUint32(4, view.byteLength - 8, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of what follows
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a frame
  view.setUint16(34, 16, true); // bits
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, index) => {
    view.setInt16(HEADER_BYTES + 2 * index, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true);
  });
  return view;
}
