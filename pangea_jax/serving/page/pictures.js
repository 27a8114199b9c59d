// Pictures of files, as data URLs within a size.

const KEPT = ["image/png", "image/webp"];
const KEPT_BYTES = 2_000_000;

/** The browser cannot read a file as a picture. */
export class Unreadable extends Error {}

/**
 * A picture as a data URL, no wider or higher than `maxSide` pixels.
 *
 * Small PNG and WebP stay as they are, so drawings keep their exact pixels. Others are drawn anew as JPEG: upright,
 * and without what cameras write into a file, such as the place.
 *
 * @param {Blob} file
 * @param {number} maxSide
 * @returns {Promise<string>}
 * @throws {Unreadable}
 */
export async function readPicture(file, maxSide) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Unreadable();
  });
  const scale = Math.min(1, maxSide / Math.max(bitmap.width, bitmap.height));
  const kept = scale === 1 && KEPT.includes(file.type) && file.size <= KEPT_BYTES;
  const blob = kept ? file : await redraw(bitmap, scale);
  bitmap.close();
  return dataUrl(blob);
}

async function redraw(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  if (!blob) throw new Unreadable();
  return blob;
}

function dataUrl(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Unreadable());
    reader.readAsDataURL(blob);
  });
}
