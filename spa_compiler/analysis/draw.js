"use strict";
const svg = document.querySelector("svg"), box = svg.viewBox.baseVal;
const whole = [box.x, box.y, box.width, box.height];

function view(x, y, width, height) {
  [box.x, box.y, box.width, box.height] = [x, y, width, height];
}
function near() { // one unit a pixel, from the top
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  view(whole[0] + (whole[2] - width) / 2, whole[1], width, height);
}
function at(event) { // where in the drawing the pointer is
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
}
function zoom(factor, x, y) {
  view(x - (x - box.x) * factor, y - (y - box.y) * factor, box.width * factor, box.height * factor);
}
function pick(row) { // shows what belongs to a row of the tables, or all of it again
  const again = row.classList.contains("on");
  document.querySelectorAll(".on").forEach((old) => old.classList.remove("on"));
  svg.classList.toggle("pick", !again);
  if (again) return;
  row.classList.add("on");
  const found = svg.querySelectorAll(`[data-k~="${row.dataset.row}"]`);
  found.forEach((part) => part.classList.add("on"));
  const first = [...found].find((part) => part.tagName === "g");
  if (!first) return;
  const place = first.getBBox();
  view(place.x + place.width / 2 - box.width / 2, place.y - box.height / 4, box.width, box.height);
}
svg.addEventListener("wheel", (event) => {
  event.preventDefault();
  const point = at(event);
  zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 400))), point.x, point.y);
}, { passive: false });
svg.addEventListener("pointermove", (event) => {
  if (event.buttons !== 1) return;
  const scale = svg.getScreenCTM().a;
  view(box.x - event.movementX / scale, box.y - event.movementY / scale, box.width, box.height);
});
document.querySelectorAll("tr[data-row]").forEach((row) => row.addEventListener("click", () => pick(row)));
document.getElementById("whole").addEventListener("click", () => view(...whole));
document.getElementById("near").addEventListener("click", near);
if (whole[2] / svg.clientWidth > 1.6 || whole[3] / svg.clientHeight > 1.6) near();
