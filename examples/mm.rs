use rpt::kernels::matmul::*;
use std::time::Instant;
fn main(){
  for (m,n,k) in [(130,192,64),(540,192,64),(540,256,64),(540,64,128),(64,64,64),(512,512,2048),(512,2048,512),(4096,1024,256),(16,1024,4096),(1,1024,4096)] {
    let a=vec![0.5f32;m*k]; let w=vec![0.25f32;n*k]; let mut p=Packed::default(); p.pack_transposed(&w,n,k);
    let mut c=vec![0.0;m*n];
    let reps = (2e9 as usize/(2*m*n*k)).max(1);
    matmul(Left::rows(&a,k),m,&p,&mut c,false);
    let t=Instant::now(); for _ in 0..reps { matmul(Left::rows(&a,k),m,&p,&mut c,false); } let s=t.elapsed().as_secs_f64();
    println!("{m}x{n}x{k}: {:.1} GF/s", (2*m*n*k*reps) as f64/s/1e9);
  }
  // weight gradient
  for (t,o,i) in [(130,192,64),(540,256,64),(4096,1024,256)] {
    let dy=vec![0.5f32;t*o]; let x=vec![0.1f32;t*i]; let mut p=Packed::default(); let mut c=vec![0.0;o*i];
    let reps=(2e9 as usize/(2*t*o*i)).max(1);
    let tm=Instant::now(); for _ in 0..reps { p.pack(&x,t,i,i); matmul(Left::transposed(&dy,o),o,&p,&mut c,true);} let s=tm.elapsed().as_secs_f64();
    println!("grad {t} {o}x{i}: {:.1} GF/s",(2*t*o*i*reps) as f64/s/1e9);
  }
}
